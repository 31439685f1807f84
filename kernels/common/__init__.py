"""What several families share: arithmetic, memory, configurations, the rules of Newton's method, sweeps over lines."""
