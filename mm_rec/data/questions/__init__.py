"""Questions with answers made from documents and programs: the wording follows a template, the answer is copied."""
