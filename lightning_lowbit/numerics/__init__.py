"""Pure functions on tensors: formats, rounding, exponents, ranges, guards; torch only, no nn.Module."""
