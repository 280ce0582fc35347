"""Plans baked into weights: in memory, into a checkpoint's own files, into quantized matrices and into adapters.

May import what excise/ may, and excise/ itself except live/.
"""
