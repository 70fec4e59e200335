import hypothesis

# A deadline measures the machine's load, not the code; derandomized, CI fails for a change or not at all.
hypothesis.settings.register_profile("spin", deadline=None, derandomize=True)
hypothesis.settings.load_profile("spin")
