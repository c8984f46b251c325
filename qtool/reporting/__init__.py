"""A verification's report for people and programs: console, Markdown, HTML, JUnit, JSON."""
