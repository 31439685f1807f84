"""Small semantic changes, one at a time, each of which a test must see: whether the tests can fail."""
