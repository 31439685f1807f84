"""The list: every change, by what it is in."""

from .diagnostics import DIAGNOSTICS
from .doors import DOORS
from .integrations import INTEGRATIONS
from .judges import JUDGES
from .kernels import KERNELS
from .layers import LAYERS
from .modes import MODES
from .paths import PATHS
from .potentials import POTENTIALS
from .processes import PROCESSES
from .short import SHORT
from .streams import STREAMS

CHANGES = [
    *KERNELS, *SHORT, *STREAMS, *PATHS, *MODES, *DOORS, *POTENTIALS, *DIAGNOSTICS, *LAYERS, *INTEGRATIONS, *PROCESSES, *JUDGES,
]  # fmt: skip
