"""What must be set before the imports that take seconds: every script imports this first.

Ctrl-C ends a script during its imports without a traceback, until `common.run` begins. Threads of
OpenMP that wait for work sleep, unless the user set OMP_WAIT_POLICY: spinning, they take twice as
long when another process needs the cores.
"""

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise it is ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)
