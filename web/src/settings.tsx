import { useSignal } from "@preact/signals";
import { connected } from "./api";
import { importAll } from "./chat/persistence";
import { defaults, setDefaults } from "./chat/sampling";
import { SamplingForm } from "./chat/samplingForm";
import { current, explain } from "./chat/state";
import { language, list, setLanguage, t, type Language } from "./i18n";
import { conversationStorage } from "./conversationStorage";
import { theme, type Theme } from "./theme";

export function SettingsView() {
  const status = useSignal("");
  const save = async () => {
    let text: string;
    try {
      text = JSON.stringify({ conversations: await conversationStorage().all() }, null, 1);
    } catch (error) {
      status.value = explain(error);
      return;
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "khaosz-conversations.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };
  const load = async (event: Event) => {
    const input = event.currentTarget as HTMLInputElement;
    const file = input.files?.[0];
    input.value = "";
    if (!file) return;
    try {
      status.value = t("imported", { n: await importAll(await file.text()) });
    } catch (error) {
      status.value = error instanceof SyntaxError ? t("importFailed") : explain(error);
    }
  };
  return (
    <div class="page">
      <h1>{t("settings")}</h1>
      <Choice
        label={t("language")}
        value={language.value}
        options={[
          ["en", "English"],
          ["zh", "中文"],
        ]}
        onChoose={(value) => setLanguage(value as Language)}
      />
      <Choice
        label={t("theme")}
        value={theme.value}
        options={[
          ["system", t("system")],
          ["light", t("light")],
          ["dark", t("dark")],
        ]}
        onChoose={(value) => (theme.value = value as Theme)}
      />
      <h2>{t("newConversations")}</h2>
      <details class="defaults">
        <summary>{t("defaultsOf")}</summary>
        <div class="form">
          <SamplingForm
            {...defaults.value}
            onChange={(change) => {
              setDefaults({ ...defaults.value, ...change });
              if (!current.value.nodes.length) current.value = { ...current.value, ...defaults.value };
            }}
          />
          <button type="button" onClick={() => setDefaults({ system: null, settings: {} })}>
            {t("reset")}
          </button>
        </div>
      </details>
      <h2>{t("conversations")}</h2>
      <div class="row">
        <button type="button" disabled={!connected.value} onClick={() => void save()}>
          {t("exportAll")}
        </button>
        <label class="button">
          {t("importFile")}
          <input class="sr-only" type="file" accept="application/json,.json" disabled={!connected.value} onChange={load} />
        </label>
        <span role="status">{status.value}</span>
      </div>
      <h2>{t("shortcuts")}</h2>
      <Keys />
      <p class="note">{t("localOnly")}</p>
    </div>
  );
}

export function Keys() {
  return (
    <dl class="keys">
      {list("shortcutList").map(([key, what]) => (
        <div key={key}>
          <dt>
            {key!.split(" ").map((each) => (
              <kbd key={each}>{each}</kbd>
            ))}
          </dt>
          <dd>{what}</dd>
        </div>
      ))}
    </dl>
  );
}

function Choice(props: {
  label: string;
  value: string;
  options: [string, string][];
  onChoose: (value: string) => void;
}) {
  return (
    <fieldset class="choice">
      <legend>{props.label}</legend>
      {props.options.map(([value, label]) => (
        <label key={value}>
          <input
            type="radio"
            name={props.label}
            checked={value === props.value}
            onChange={() => props.onChoose(value)}
          />
          <span>{label}</span>
        </label>
      ))}
    </fieldset>
  );
}
