"""Which families are proven, in which layouts, and the table of it."""
