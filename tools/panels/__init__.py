"""How the general panels are made: texts written for them, graded by construction, also drawn as pages and charts."""
