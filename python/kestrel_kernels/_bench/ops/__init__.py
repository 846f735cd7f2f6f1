"""A bench entry per op: every class with an `op` name in any module of this folder, found by looking."""
