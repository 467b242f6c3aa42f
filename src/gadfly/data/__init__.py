"""Rows of prompts and teacher responses, from files, hubs and what was collected."""
