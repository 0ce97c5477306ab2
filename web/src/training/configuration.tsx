import { useSignal } from "@preact/signals";
import { t } from "../i18n";
import { Swatch } from "./chart";
import { differing } from "./series";
import { details } from "./state";

/** How the runs were set up: of several, where they differ. */
export function Configuration(props: { ids: string[] }) {
  const all = useSignal(false);
  const known = props.ids.filter((id) => details.value[id]);
  if (!known.length) return null;
  const several = known.length > 1;
  const configs = known.map((id) => {
    const { config, plan } = details.value[id]!.config;
    return { ...config, plan };
  });
  const rows = differing(configs, all.value || !several).filter(([key]) => key !== "out");
  const table = rows.length ? (
    <div class="wide-table">
      <table class="settings">
        <thead>
          <tr>
            <th scope="col">{t("keyOf")}</th>
            {known.map((id) => (
              <th key={id} scope="col">
                {several && <Swatch colour={props.ids.indexOf(id)} />} {id}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {rows.map(([key, values]) => (
            <tr key={key}>
              <th scope="row">{key}</th>
              {values.map((value, i) => (
                <td key={known[i]}>{value ?? "–"}</td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  ) : (
    <p class="note">{t("noDifferences")}</p>
  );
  if (!several) {
    return (
      <details class="configuration">
        <summary>{t("configuration")}</summary>
        {table}
      </details>
    );
  }
  return (
    <section class="configuration">
      <div class="row spread">
        <h2>{t("differences")}</h2>
        <label class="check">
          <input
            type="checkbox"
            checked={all.value}
            onChange={(event) => (all.value = event.currentTarget.checked)}
          />{" "}
          {t("allKeys")}
        </label>
      </div>
      {table}
    </section>
  );
}
