"""Conversion from and to other architectures, export, quantization and serving."""
