# Read by CMake while llama-cpp-python is built. It wants llama.cpp's common library, which it does not use, and which
# takes as long to build as all else.
set(LLAMA_BUILD_COMMON OFF)
