import os
import random

import hypothesis

# Before torch is imported. Models this small gain nothing from more threads, and on a busy machine threads wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Moments of kills. Drawn once, here: the workers of pytest-xdist take it over, and must agree on the names of tests.
os.environ.setdefault("SPIN_KILL_SEED", str(random.SystemRandom().randrange(10**6)))

# A deadline measures the machine's load, not the code; derandomized, CI fails for a change or not at all.
hypothesis.settings.register_profile("spin", deadline=None, derandomize=True)
hypothesis.settings.load_profile("spin")
