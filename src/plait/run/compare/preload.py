"""What the server process that workers are forked from has imported, without a word of libraries.

Nothing else imports this module: it silences the process that does.
"""

import logging

logging.disable(logging.WARNING)

import plait.run.compare.warm  # noqa: E402
import plait.run.train  # noqa: E402, F401
