"""What is told of texts: leaks, surfaces, near-duplicates, who wrote them, who wins."""
