import "./styles/base.css";
import "./styles/shell.css";
import "./styles/chat.css";
import "./styles/markdown.css";
import "./styles/panels.css";
import "./styles/documents.css";
import "./styles/training.css";
import "./styles/preferences.css";
import { render } from "preact";
import { lookAround, offers } from "./api";
import { App } from "./app";
import { explain, problem, refreshBases, refreshList, refreshModels } from "./chat/state";

render(<App />, document.getElementById("app")!);

try {
  await lookAround();
  await Promise.all([refreshModels(), refreshList(), offers.value.bases && refreshBases()]);
} catch (error) {
  problem.value = explain(error);
}
