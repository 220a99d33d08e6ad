"""What is adapted: the small models of the project and the published towers."""
