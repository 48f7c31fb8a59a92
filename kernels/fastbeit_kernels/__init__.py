"""Triton kernels of fastbeit, each beside the plain PyTorch function that defines it.

Importing needs torch alone. Without Triton the references serve; the first use of a Triton path says what to install.
"""
