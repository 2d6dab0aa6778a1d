"""How clients speak with an engine over HTTP."""
