"""C++ kernels for CPU and the library that they are compiled into."""
