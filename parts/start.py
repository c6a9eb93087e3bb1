"""What must be set before the imports that take seconds: every script imports this first.

Ctrl-C ends a script during its imports without a traceback, until `common.run` begins.
"""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise it is ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)
