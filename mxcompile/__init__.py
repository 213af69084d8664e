"""mxcompile: a mixed-precision compiler for edge devices."""
