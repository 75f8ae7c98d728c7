from hypothesis import settings

# A shared machine may take its time over the first example.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
