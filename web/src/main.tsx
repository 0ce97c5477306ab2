import "./styles/base.css";
import "./styles/shell.css";
import "./styles/chat.css";
import "./styles/markdown.css";
import "./styles/panels.css";
import "./styles/documents.css";
import "./styles/models.css";
import "./styles/training.css";
import "./styles/preferences.css";
import { render } from "preact";
import { App } from "./app";
import { connect, models } from "./chat/state";
import { connected, features } from "./api";
import { go, route } from "./router";

/** Without a model, there is nothing to do in the chat. */
function openCatalogue(): void {
  const none = models.value.every((each) => each.kind !== "chat");
  if (connected.value && none && features.value.catalogue && route.value.view === "chat") go("models");
}

render(<App />, document.getElementById("app")!);

await connect();
openCatalogue();
