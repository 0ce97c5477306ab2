import { useSignal } from "@preact/signals";
import type { FunctionComponent } from "preact";
import { useEffect } from "preact/hooks";
import { keepKey, keyAsked, keyRefused, met, offers } from "./api";
import { composing } from "./chat/composer";
import { History } from "./chat/history";
import { open, startAnew } from "./chat/keeping";
import { said, stop } from "./chat/state";
import { ChatView } from "./chat/view";
import { Dialog } from "./components/dialog";
import { Icon } from "./components/icons";
import { DocumentsView } from "./documents/view";
import { t } from "./i18n";
import { PreferencesView } from "./preferences/view";
import { href, route } from "./router";
import { Keys, SettingsView } from "./settings";
import { TrainingView } from "./training/view";

interface View {
  name: "chat" | "documents" | "training" | "preferences" | "settings";
  shown: () => boolean;
  view: FunctionComponent;
}

/** What there is to see; a part that the server lacks is not shown. */
export const views: View[] = [
  { name: "chat", shown: () => true, view: ChatView },
  { name: "documents", shown: () => offers.value.bases, view: DocumentsView },
  { name: "training", shown: () => offers.value.runs, view: TrainingView },
  { name: "preferences", shown: () => offers.value.preferences, view: PreferencesView },
  { name: "settings", shown: () => true, view: SettingsView },
];

export function App() {
  const drawer = useSignal(false);
  const help = useSignal(false);
  const there = views.filter((each) => each.shown());
  const at = there.find((each) => each.name === route.value.view) ?? there[0]!;
  useEffect(() => {
    if (met.value && route.value.view === "chat") void open(route.value.id);
  }, [route.value, met.value]);
  useEffect(() => {
    document.title = at.name === "chat" ? "KHAOSZ" : `${t(at.name)} · KHAOSZ`;
  });
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      // An input method's keys are its own, and a dialog is before all else.
      if (composing(event) || document.querySelector("dialog[open]")) return;
      const writing = (event.target as HTMLElement).matches("input, textarea, select");
      if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
        event.preventDefault();
        startAnew();
      } else if (event.key === "Escape") {
        stop();
        drawer.value = false;
      } else if (event.key === "/" && !writing) {
        event.preventDefault();
        document.getElementById("message")?.focus();
      } else if (event.key === "?" && !writing) help.value = true;
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
  const Shown = at.view;
  return (
    <div class={drawer.value ? "shell drawn" : "shell"}>
      <a class="skip" href="#main" onClick={toMain}>
        {t("skip")}
      </a>
      <header class="top">
        <button type="button" class="quiet" aria-label={t("menu")} onClick={() => (drawer.value = true)}>
          <Icon name="menu" />
        </button>
        <span class="brand">KHAOSZ</span>
        <button type="button" class="quiet" aria-label={t("newChat")} onClick={startAnew}>
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
          {there.map((each) => (
            <li key={each.name}>
              <a
                href={href(each.name)}
                aria-current={each === at ? "page" : undefined}
                onClick={() => (drawer.value = false)}
              >
                <Icon name={each.name} /> {t(each.name)}
              </a>
            </li>
          ))}
        </ul>
        <History onGo={() => (drawer.value = false)} />
      </nav>
      <main id="main" tabindex={-1}>
        <Shown />
      </main>
      <div class="sr-only" role="status" aria-live="polite">
        {said.value}
      </div>
      {help.value && (
        <Dialog title={t("keys")} onClose={() => (help.value = false)}>
          <Keys />
        </Dialog>
      )}
      {keyAsked.value && <KeyDialog give={keyAsked.value} />}
    </div>
  );
}

function toMain(event: Event): void {
  event.preventDefault(); // the part behind # is the view's
  document.getElementById("main")?.focus();
}

function KeyDialog(props: { give: (key: string | null) => void }) {
  const key = useSignal("");
  const long = useSignal(false);
  const submit = (event: Event) => {
    event.preventDefault();
    keepKey(key.value.trim(), long.value);
    props.give(key.value);
  };
  return (
    <Dialog title={t("keyTitle")} onClose={() => props.give(null)}>
      <form class="form" onSubmit={submit}>
        <p>{t("keyText")}</p>
        {keyRefused.value && <p role="alert">{t("keyWrong")}</p>}
        <label>
          <span>{t("key")}</span>
          <input
            type="password"
            autocomplete="current-password"
            required
            value={key.value}
            onInput={(event) => (key.value = event.currentTarget.value)}
          />
        </label>
        <label class="check">
          <input
            type="checkbox"
            checked={long.value}
            onChange={(event) => (long.value = event.currentTarget.checked)}
          />
          <span>{t("remember")}</span>
        </label>
        <button type="submit" class="primary">
          {t("open")}
        </button>
      </form>
    </Dialog>
  );
}
