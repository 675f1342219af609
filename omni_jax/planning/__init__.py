"""What a run needs, found out by the compiler before anything is rented: memory, collectives, time."""
