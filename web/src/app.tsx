import { useSignal } from "@preact/signals";
import type { FunctionComponent } from "preact";
import { useEffect, useRef } from "preact/hooks";
import { storeKey, isKeyAccepted, keyPrompt, keyRejected, connected, features } from "./api";
import { isComposing } from "./chat/composer";
import { attach, refreshOpen } from "./chat/generation";
import { History } from "./chat/history";
import { open, startNewChat } from "./chat/persistence";
import { announcement, current, stop } from "./chat/state";
import { ChatView } from "./chat/view";
import { Dialog } from "./components/dialog";
import { Icon } from "./components/icons";
import { DocumentsView } from "./documents/view";
import { t } from "./i18n";
import { ModelsView } from "./models/view";
import { PreferencesView } from "./preferences/view";
import { href, route } from "./router";
import { Keys, SettingsView } from "./settings";
import { TrainingView } from "./training/view";

interface View {
  name: "chat" | "models" | "documents" | "training" | "preferences" | "settings";
  available: () => boolean;
  view: FunctionComponent;
}

/** Views in the order of the menu; those that the server does not support are hidden. */
export const views: View[] = [
  { name: "chat", available: () => true, view: ChatView },
  { name: "models", available: () => features.value.catalogue, view: ModelsView },
  { name: "documents", available: () => features.value.knowledgeBases, view: DocumentsView },
  { name: "training", available: () => features.value.runs, view: TrainingView },
  { name: "preferences", available: () => features.value.preferences, view: PreferencesView },
  { name: "settings", available: () => true, view: SettingsView },
];

export function App() {
  const drawer = useSignal(false);
  const help = useSignal(false);
  const visible = views.filter((each) => each.available());
  const active = visible.find((each) => each.name === route.value.view) ?? visible[0]!;
  useEffect(() => {
    const { view, id } = route.value;
    if (!connected.value || view !== "chat") return;
    void open(id).then(() => {
      if (id !== null && current.value.id === id) void attach(id);
    });
  }, [route.value, connected.value]);
  useEffect(() => {
    const onReturn = () => {
      if (connected.value && document.visibilityState === "visible") void refreshOpen();
    };
    addEventListener("focus", onReturn);
    addEventListener("online", onReturn);
    document.addEventListener("visibilitychange", onReturn);
  }, []);
  useEffect(() => {
    document.title = active.name === "chat" ? "KHAOSZ" : `${t(active.name)} · KHAOSZ`;
  });
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      // Leave keys to input methods and to open dialogs.
      if (isComposing(event) || document.querySelector("dialog[open]")) return;
      const inField = (event.target as HTMLElement).matches("input, textarea, select");
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
        event.preventDefault();
        startNewChat();
      } else if (event.key === "Escape") {
        stop();
        drawer.value = false;
      } else if (event.key === "/" && !inField) {
        event.preventDefault();
        document.getElementById("message")?.focus();
      } else if (event.key === "?" && !inField) help.value = true;
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
  const ActiveView = active.view;
  return (
    <div class={drawer.value ? "shell drawn" : "shell"}>
      <a class="skip" href="#main" onClick={toMain}>
        {t("skipToMain")}
      </a>
      <header class="top">
        <button type="button" class="quiet" aria-label={t("menu")} onClick={() => (drawer.value = true)}>
          <Icon name="menu" />
        </button>
        <span class="brand">KHAOSZ</span>
        <button type="button" class="quiet" aria-label={t("newChat")} onClick={startNewChat}>
          <Icon name="plus" />
        </button>
      </header>
      <div class="veil" onClick={() => (drawer.value = false)} />
      <nav class="side" aria-label={t("menu")}>
        <div class="brand-row">
          <span class="brand">KHAOSZ</span>
          <button
            type="button"
            class="quiet only-phone"
            aria-label={t("close")}
            onClick={() => (drawer.value = false)}
          >
            <Icon name="close" />
          </button>
        </div>
        <ul class="views">
          {visible.map((each) => (
            <li key={each.name}>
              <a
                href={href(each.name)}
                aria-current={each === active ? "page" : undefined}
                onClick={() => (drawer.value = false)}
              >
                <Icon name={each.name} /> {t(each.name)}
              </a>
            </li>
          ))}
        </ul>
        <History onNavigate={() => (drawer.value = false)} />
      </nav>
      <main id="main" tabindex={-1}>
        <ActiveView />
      </main>
      <div class="sr-only" role="status" aria-live="polite">
        {announcement.value}
      </div>
      {help.value && (
        <Dialog title={t("shortcuts")} onClose={() => (help.value = false)}>
          <Keys />
        </Dialog>
      )}
      {keyPrompt.value && <KeyDialog onKey={keyPrompt.value} />}
    </div>
  );
}

function toMain(event: Event): void {
  event.preventDefault(); // the fragment belongs to the router
  document.getElementById("main")?.focus();
}

function KeyDialog(props: { onKey: (key: string | null) => void }) {
  const key = useSignal("");
  const remember = useSignal(false);
  const checking = useSignal(false);
  const input = useRef<HTMLInputElement>(null);
  // The dialog stays until the key is accepted: what is typed next must not land in the page below.
  const submit = async (event: Event) => {
    event.preventDefault();
    if (checking.value) return;
    checking.value = true;
    storeKey(key.value.trim(), remember.value);
    const accepted = await isKeyAccepted();
    checking.value = false;
    if (accepted) return props.onKey(key.value);
    keyRejected.value = true;
    input.current?.select();
  };
  return (
    <Dialog title={t("keyRequired")} onClose={() => props.onKey(null)}>
      <form class="form" onSubmit={submit}>
        <p>{t("keyHint")}</p>
        {keyRejected.value && <p role="alert">{t("keyRejected")}</p>}
        <label>
          <span>{t("apiKey")}</span>
          <input
            ref={input}
            type="password"
            autofocus
            autocomplete="current-password"
            required
            value={key.value}
            onInput={(event) => (key.value = event.currentTarget.value)}
          />
        </label>
        <label class="check">
          <input
            type="checkbox"
            checked={remember.value}
            onChange={(event) => (remember.value = event.currentTarget.checked)}
          />
          <span>{t("remember")}</span>
        </label>
        <button type="submit" class="primary" aria-busy={checking.value}>
          {t("continue")}
        </button>
      </form>
    </Dialog>
  );
}
