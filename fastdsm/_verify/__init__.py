"""Every call held against the float64 oracle: what ``fastdsm verify`` runs."""
