"""Everything that a GPU alone can show, in order of worth, in calls of some minutes that go on where the last one stopped."""
