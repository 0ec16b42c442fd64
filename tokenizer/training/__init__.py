"""How AToken is trained: data store, objective, schedule, state and the plain single-process loop."""
