"""Python runs this file at its start, if the folder is on PYTHONPATH: see conftest.py in the root.

A notebook's kernel, and what it starts, then finds the network unreachable, but for this computer
itself.  Attempts are written down as well: a library may fall back quietly on what it has.
"""

import errno
import os
import sys

EVENTS = {"socket.getaddrinfo": 0, "socket.gethostbyname": 0, "socket.connect": 1,
          "socket.sendto": 1, "socket.sendmsg": 1}  # where the address is among the arguments


def is_here(address) -> bool:
    """Whether an address is of this computer; a text is a name, or a Unix socket's file."""
    host = address[0] if isinstance(address, tuple) else address
    host = host.decode(errors="replace") if isinstance(host, bytes) else host
    return (not host or host in ("localhost", "::1", "0.0.0.0") or str(host).startswith("127.")
            or (not isinstance(address, tuple) and str(host).startswith(("/", "\0"))))


def refuse(event, args):
    if event in EVENTS and not is_here(args[EVENTS[event]]):
        with open(os.environ["MINIDIFFUSER_NETWORK_LOG"], "a") as log:
            log.write(f"{os.path.basename(os.getcwd())}: {event} {args[EVENTS[event]]}\n")
        raise OSError(errno.ENETUNREACH, "the tests cut the network off")


if "ipykernel_launcher" in sys.orig_argv:
    os.environ["MINIDIFFUSER_IN_A_KERNEL"] = "1"  # for the processes it starts
if os.environ.get("MINIDIFFUSER_IN_A_KERNEL"):
    sys.addaudithook(refuse)
