import os

# A peer in the same process needs memory too. Read when JAX starts its first device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
