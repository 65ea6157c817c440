"""Text that the teacher, a student or a mixture of both writes, kept as a corpus."""
