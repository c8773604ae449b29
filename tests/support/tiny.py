from plait.testing.tiny import *  # noqa: F403
