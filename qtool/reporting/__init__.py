"""A verification's report in the forms that people and programs read: console, Markdown, HTML, JUnit, JSON schema.

Rule: pure functions from a report to text; only `write` touches the disk, and nothing here measures or judges.
"""
