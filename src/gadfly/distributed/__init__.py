"""The processes of a run: how they meet, share what one has done, and notice that one is lost."""
