"""Tools of those who build the course: stored notebooks and decks; not installed."""
