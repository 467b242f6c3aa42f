"""The demo's world: a scripted teacher with an exact oracle, and a student that forgets."""
