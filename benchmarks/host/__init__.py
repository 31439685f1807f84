"""What the host does for a call: its time, with launches that do nothing."""
