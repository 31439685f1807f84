"""Pages are run as programs elsewhere: transformers must not take a checkout's kernels/ for a package."""

import sys

sys.modules.setdefault("kernels", None)
