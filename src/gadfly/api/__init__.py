"""What talks to servers: asking a chat API once for each answer, and in batches."""
