"""What several methods are made of; none of it is a method."""
