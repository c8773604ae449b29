"""`python -m plait` is the same as `plait`."""

import sys

from plait_cli import main

sys.exit(main())
