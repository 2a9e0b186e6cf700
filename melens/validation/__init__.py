"""Types of arguments and options, each with the sentence that refuses a wrong value."""
