import "./styles/base.css";
import "./styles/shell.css";
import "./styles/chat.css";
import "./styles/markdown.css";
import "./styles/panels.css";
import "./styles/documents.css";
import "./styles/training.css";
import "./styles/preferences.css";
import { render } from "preact";
import { App } from "./app";
import { connect } from "./chat/state";

render(<App />, document.getElementById("app")!);

await connect();
