"""The operator's quantisation in torch, slow and right: what functions and kernels are compared with."""
