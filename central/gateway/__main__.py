"""`python -m central.gateway STATE`."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC is imported: a refusal is one line, ours

from central.gateway.server import main

if __name__ == "__main__":
    main()
