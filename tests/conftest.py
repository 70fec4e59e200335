import os

import hypothesis

# Before torch is imported. Models this small gain nothing from more threads, and on a busy machine threads wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A deadline measures the machine's load, not the code; derandomized, CI fails for a change or not at all.
hypothesis.settings.register_profile("spin", deadline=None, derandomize=True)
hypothesis.settings.load_profile("spin")
