"""What runs around the CUDA C++ kernels: tiles, workspaces and the matrix products that torch does best."""
