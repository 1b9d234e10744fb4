"""When? Actions, generators, checker and simulator, all pure; and the runtime that executes exactly the list."""
