"""The paper's findings, asked again with small runs: what a study is, which there are, and how they are run."""
